"""The pages' HTML, CSS and JavaScript, taken out of ztoapi.py for prettier and eslint.

python .ci/pages.py out FOLDER    a file for each text; in FOLDER/whole each page's script as it runs
python .ci/pages.py back FOLDER   the files put back, after they were changed there
"""

import re
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent.parent / "ztoapi.py"
FILES = {
    "STYLE": "style.css",
    "COMMON_SCRIPT": "common.js",
    "DOCS_HTML": "docs.html",
    "DOCS_SCRIPT": "docs.js",
    "DASHBOARD_HTML": "dashboard.html",
    "DASHBOARD_SCRIPT": "dashboard.js",
}
# A page's script is the common one and its own behind it. So it is linted: each uses names of the other.
SCRIPTS = {"whole/docs.js": "DOCS_SCRIPT", "whole/dashboard.js": "DASHBOARD_SCRIPT"}


def text_of(name: str) -> re.Pattern[str]:
    return re.compile(rf'^({name} = r?"""\\?\n)(.*?)(""")', re.DOTALL | re.MULTILINE)


def take_out(folder: Path) -> None:
    (folder / "whole").mkdir(parents=True, exist_ok=True)
    program = PROGRAM.read_text()
    texts = {}
    for name, file in FILES.items():
        found = text_of(name).search(program)
        if found is None:
            sys.exit(f"{PROGRAM.name} has no {name}")
        texts[name] = found[2]
        (folder / file).write_text(found[2])
    for file, name in SCRIPTS.items():
        (folder / file).write_text(f"{texts['COMMON_SCRIPT']}\n{texts[name]}")


def put_back(folder: Path) -> None:
    program = PROGRAM.read_text()
    for name, file in FILES.items():
        text = (folder / file).read_text()
        if '"""' in text:
            sys.exit(f"{file} has three quotes in a row, which would end its text")
        program = text_of(name).sub(lambda found, new=text: found[1] + new + found[3], program)
    PROGRAM.write_text(program)


if __name__ == "__main__":
    way, folder = sys.argv[1:]
    {"out": take_out, "back": put_back}[way](Path(folder))
