"""Measurements of Isthmus beside what people use today: `isthmus bench`.

Read in this order: :mod:`.cases` (what is measured), :mod:`.transports` (what carries it, and how to add
one), :mod:`.worker` (the process in which one end runs), :mod:`.runner` (who interleaves, repeats and takes
medians).
"""
