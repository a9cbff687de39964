"""Write the page of a run, or the generated parts of the README.

    python -m nbhelpers.report page   [--profile P --seed N]      reports/<profile>/index.html
    python -m nbhelpers.report readme [--profile P --seed N]      README.md, between its markers

Without --profile, the page is that of quick; the README leads with thorough where its report has a finding.
"""

import argparse
import sys

from nbhelpers.profiles import ProfileError, get_profile
from nbhelpers.report.page import write_index
from nbhelpers.report.readme import leading_profile, write_measured, write_readme
from nbhelpers.workspace import WorkspaceError, open_run


def main() -> None:
    """Run the command line; errors end it with one line."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.report", description="Write the report or the README.")
    parser.add_argument("document", choices=["page", "readme"])
    parser.add_argument("--profile")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        profile = options.profile or (leading_profile() if options.document == "readme" else "quick")
        run = open_run(get_profile(profile), options.seed)
        if options.document == "page":
            write_index(run)
        else:
            write_readme(run)
            write_measured()
    except (ProfileError, WorkspaceError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
