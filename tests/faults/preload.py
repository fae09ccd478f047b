"""What the server of `tests.faults.harness` imports before it forks."""

from tests.faults import harness

harness.import_commands()
