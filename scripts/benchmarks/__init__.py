"""What embedcam costs: one tool with a section for each bar."""
