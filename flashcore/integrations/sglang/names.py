"""What SGLang calls this backend."""

NAME = "flashcore"
