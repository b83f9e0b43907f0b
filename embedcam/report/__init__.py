"""Reports: many queries explained on one page, and as JSON lines; goes on where it was stopped."""

from .folder import LINES, PAGE, check_folder
from .report import Report, write_report

__all__ = ["LINES", "PAGE", "Report", "check_folder", "write_report"]
