"""The server of which test runs are forked has imported what they need, or each would import it itself."""

from recorded_run import CONTEXT, PRELOADED


def test_a_fork_finds_everything_imported() -> None:
    code = f"import sys; assert {set(PRELOADED)} <= sys.modules.keys()"
    process = CONTEXT.Process(target=exec, args=(code,))
    process.start()
    process.join()
    assert process.exitcode == 0
