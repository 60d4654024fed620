"""The protocol of the GPU kernels against the axioms of PTX's memory model, by enumeration: docs/memory_model.md."""
