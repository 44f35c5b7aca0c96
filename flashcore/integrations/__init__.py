"""flashcore inside other libraries; each package here is imported by name, never by flashcore."""
