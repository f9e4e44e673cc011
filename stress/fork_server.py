"""What the fork server of a scenario imports first: it ends with the scenario, and its children with it."""

from stress.scenario import end_with_parent

end_with_parent()
