"""The scenarios, one in each module, as SCENARIO."""
