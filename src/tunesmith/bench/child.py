"""One run in a process of its own, so that its peak memory is its own: a recipe's fields on stdin, events as JSON lines on stdout."""

import json
import os
import sys
import traceback

from ..errors import TunesmithError


def main() -> None:
    # What a library prints must not stand between the events.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(event: dict) -> None:
        print(json.dumps(event), file=events, flush=True)

    fields = json.load(sys.stdin)
    try:
        from ..train import recipe, run

        run(recipe.check(fields), tell, resume=True)
    except TunesmithError as error:
        tell({"event": "failure", "text": str(error)})
    except Exception as error:
        traceback.print_exc()
        tell({"event": "failure", "text": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
