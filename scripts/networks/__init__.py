"""Which networks are explained by one line, and how: `python -m scripts.networks`."""
