"""What an MH-FFN is: reads graphs, never edits them, knows no Triton."""
