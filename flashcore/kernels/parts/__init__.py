"""The parts a kernel is put together from: loads, pipelines, scheduler, products, softmax, ..."""
