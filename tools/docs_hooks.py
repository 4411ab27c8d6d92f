"""Lets pages of the site show what lies outside ``docs/``: measured results and the examples.

Pages link to ``../benchmarks/results/x.png`` and ``../examples/README.md``, as a Git host wants it.
The site has the files in folders of its own, and the links lead there. The scripts that the
examples' page links to are not part of the site: there they are plain names.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS, EXAMPLES = "benchmarks/results", "examples/README.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the results and the examples' page to the files of the site."""
    root = Path(config.config_file_path).parent
    for path in sorted((root / RESULTS).iterdir()):
        if path.suffix in (".png", ".md"):
            name = f"{RESULTS}/{path.name}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    page = (root / EXAMPLES).read_text()
    page = re.sub(r"\[([^\]]+)\]\([\w./]+\.(?:sh|sbatch)\)", r"\1", page)
    files.append(File.generated(config, EXAMPLES, content=page))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links out of ``docs/`` into the site."""
    for outside in (f"{RESULTS}/", EXAMPLES):
        markdown = markdown.replace(f"](../{outside}", f"]({outside}")
    return markdown
