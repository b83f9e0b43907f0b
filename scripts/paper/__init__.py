"""What scripts/paper_tables.py is made of.

cache.py       forward passes and the head, kept between runs
bench.py       one data set under the reference embedding, and what is measured on it
weights.py     which weights: averaging, encodings, targets, methods, sampling
transfers.py   weights from neighbours and prototypes, beside weights of the query's own
report.py      rows, Markdown, figures
carrying.py    the section on transfer
sections.py    each section's tables, what they say, and its bars
"""
