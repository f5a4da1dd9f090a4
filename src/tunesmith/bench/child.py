"""One run in a process of its own, so that its peak memory is its own: a request on stdin, events as JSON lines on stdout."""

import json
import sys
import traceback

from ..errors import TunesmithError


def main() -> None:
    events, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not stand between the events

    def tell(event: dict) -> None:
        print(json.dumps(event), file=events, flush=True)

    request = json.load(sys.stdin)
    try:
        from ..train import recipe, run

        run(recipe.check(request["recipe"]), tell, resume=request["resume"], overwrite=request["overwrite"])
    except TunesmithError as error:
        tell({"event": "failure", "text": str(error)})
    except Exception as error:
        traceback.print_exc()
        tell({"event": "failure", "text": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
