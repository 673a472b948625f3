"""Teaches a small tower to speak to a frozen language model, from drawings alone.

First the tower reads: each embedding says which characters and shapes lie where it looks, and
is like the language model's own embeddings of the tokens written there (`read`). No language
model runs for that. Then it speaks: the language model, frozen, transcribes and answers from
what it sees, and what it gets wrong is the tower's to mend (`speak`). `run` does one stage
after the other, and goes on where it was stopped.
"""
