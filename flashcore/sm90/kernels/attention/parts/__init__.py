"""Parts of both attention kernels: pipelines, products, softmax, consumer schedule, epilogue."""
