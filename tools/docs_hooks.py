"""Lets pages of the site show the pictures and tables of ``benchmarks/results`` where they lie.

Pages link to ``../benchmarks/results/x.png``, as a Git host wants it. The site has the files in its
own ``benchmarks/results``, and the links lead there.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = "benchmarks/results"


def on_files(files: Files, config: Any) -> Files:
    """Add the results to the files of the site."""
    root = Path(config.config_file_path).parent
    for path in sorted((root / RESULTS).iterdir()):
        if path.suffix in (".png", ".md"):
            name = f"{RESULTS}/{path.name}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to the results into the site."""
    return markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/")
