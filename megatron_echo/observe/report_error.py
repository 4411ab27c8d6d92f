"""What the report raises."""


class ReportError(ValueError):
    """A file that a report is made from is missing or damaged."""
