"""`python -m fastgpt.info [--json]`: print what this installation can run."""

import argparse

from fastgpt.info import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastgpt.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    print(info().to_json() if arguments.json else info())


if __name__ == "__main__":
    main()
