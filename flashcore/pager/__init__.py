"""Stage 1, the pager: a batch's page tables -> CSR layout (rows = sequences, columns = pages)."""
