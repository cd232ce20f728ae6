"""What `hf-erasure` starts: the command line, without the package, whose import takes seconds and help does not need.

The name `hf_erasure` stands for a module that has its place and no content yet; the command that does something fills
it (`hf_erasure.cli.app.later`), and from there on everything is as after `import hf_erasure`.
"""

import importlib
import importlib.util
import sys


def main() -> None:
    """Run the command that was typed."""
    if "hf_erasure" not in sys.modules:
        spec = importlib.util.find_spec("hf_erasure")
        if spec is None:
            raise ImportError("hf_erasure is not installed beside its command: install hf-erasure again")
        sys.modules["hf_erasure"] = importlib.util.module_from_spec(spec)
    importlib.import_module("hf_erasure.cli").app()


if __name__ == "__main__":
    main()
