"""Search in pages that are opened as files, without a script from elsewhere.

Material's plugin `offline` names a script on a server; `docs/js/file-worker.js` does the same.
"""

import re

from mkdocs.utils import get_relative_url

_SCRIPT = re.compile(r'src="https://unpkg\.com/iframe-worker/shim"')


def on_post_page(output, page, config):
    """Name the script of the site itself."""
    return _SCRIPT.sub(f'src="{get_relative_url("js/file-worker.js", page.url)}"', output)


def on_post_template(output_content, template_name, config):
    """The same for the page of errors, which may be shown at any address."""
    return _SCRIPT.sub('src="/js/file-worker.js"', output_content)
