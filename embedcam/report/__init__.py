"""Reports: many queries explained on one page, and as JSON lines; goes on where it was stopped."""

from .folder import LINES, PAGE, check_folder
from .report import WrittenReport, write_report

__all__ = ["LINES", "PAGE", "WrittenReport", "check_folder", "write_report"]
