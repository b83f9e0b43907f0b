"""Reports: many queries explained on one page, and as JSON lines; goes on where it was stopped.

job.py     `write_report`: the queries, a batch at a time
queries.py one query: opened, explained, made into a row and a line
folder.py  the folder: what it is a report of, what is finished, and its files
words.py   what the page says above its rows
"""

from .folder import LINES, PAGE, check_folder
from .job import Report, write_report

__all__ = ["LINES", "PAGE", "Report", "check_folder", "write_report"]
