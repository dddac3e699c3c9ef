"""The parts of `tests/bench/compare`: one reason to exist per file.

Read in this order: `rotation` (what happens when), `tools/base` (what a tool is), `measuring` (what a step costs),
`quiet` (what would falsify it), `goals` (what it is held against).
"""
