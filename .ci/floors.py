"""Print the floors of pyproject.toml as constraints for pip: of what the package needs, and of the extras named."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = [needed for extra in sys.argv[1:] for needed in project["optional-dependencies"][extra]]
for needed in (*project["dependencies"], *extras):
    print(re.sub(r">=([\w.]+).*", r"==\1", needed))
