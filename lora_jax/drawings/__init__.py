"""Pages, receipts, charts and puzzles that the project draws itself, labelled exactly.

They are what a tower of our own learns to see from: as many as are wanted, each a pure
function of its kind, a seed and a number. `drawing.draw` makes one.
"""
