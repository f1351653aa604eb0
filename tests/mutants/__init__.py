"""Breaks the checks and the gradients one at a time, and asks whether a test notices.

    make mutants                                        all of them
    make mutants MUTANTS_ARGS="--only patterns/checks.py --limit 50 --seed 1"
    make mutants WORKERS=28   on a machine of as many cores

points.py      which changes there are, found in the syntax trees
reach.py       which tests run which statements, recorded once
loading.py     imports modules with the calls in them that record this
graphs.py      the graphs that tests read, kept, to ask which a change reads differently
running.py     a process for each change, forked from one that has run the tests as they are
sharing.py     several processes that divide the tests and ask theirs about every change
results.py     what became of each change, written down while it runs
equivalent.py  the changes that change nothing, each with the reason
"""
