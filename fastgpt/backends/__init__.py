"""The backends: each wires its kernels into the table of `fastgpt.dispatch`."""
