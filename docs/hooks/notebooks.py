"""Shows the notebooks of examples/notebooks, executed, as pages under notebooks/.

They become Markdown, so that formulas, links and code are treated as on every other page. With
BAYESAGG_NOTEBOOK_EPOCHS in the environment they train for that many epochs, for a site that is only
to be checked.
"""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


def on_files(files, *, config):
    """Execute what has changed, and add a page, its figures and the notebook itself."""
    root = Path(config.config_file_path).parent
    folder, command = "notebooks", [sys.executable, "-m", "examples.notebooks"]
    if epochs := os.environ.get("BAYESAGG_NOTEBOOK_EPOCHS"):
        folder, command = f"notebooks-{epochs}", [*command, "--epochs", epochs]
    if subprocess.run(command, cwd=root).returncode:
        raise PluginError("the notebooks cannot be executed: see above")
    for source in sorted((root / "examples" / "notebooks").glob("*.ipynb")):
        executed = root / "build" / folder / source.name
        page, figures = render(json.loads(executed.read_text(encoding="utf-8")), source.stem)
        uri = f"notebooks/{source.stem}"
        files.append(File.generated(config, f"{uri}.md", content=page))
        files.append(File.generated(config, f"{uri}.ipynb", abs_src_path=str(source)))
        for name, content in figures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))


def render(notebook, name):
    """Markdown of an executed notebook, and the figures in it by file name."""
    parts, figures = [], {}
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # The notebook links to the sources of the pages, from where it lies.
            parts.append(text.replace("](../../docs/", "](../"))
            continue
        parts.append(_fence(text, "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "text" in output:
                parts.append(_fence("".join(output["text"]).rstrip(), "text"))
            elif "image/png" in data:
                figure = f"{name}-{len(figures) + 1}.png"
                figures[figure] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{cell['metadata']['alt']}]({figure})")
            elif "text/html" in data:
                parts.append(_table("".join(data["text/html"])))
            elif "text/plain" in data:
                parts.append(_fence("".join(data["text/plain"]), "text"))
    title, *rest = parts[0].split("\n", 1)
    note = f"[The notebook]({name}.ipynb) of this page is in `examples/notebooks`."
    return "\n\n".join([title, note, *rest, *parts[1:]]) + "\n", figures


def _fence(text, language):
    return f"```{language}\n{text}\n```"


def _table(html):
    """A pandas table without its own style, so that it gets the theme's."""
    html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    html = re.sub(r'<table border="1" class="dataframe">', "<table>", html)
    return re.sub(r"\n\s*", "\n", re.sub(r' style="[^"]*"', "", html)).strip()
