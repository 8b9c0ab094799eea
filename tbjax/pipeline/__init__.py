"""Pipelines: a schedule is data, which one simulator prices, one picture shows and one executor runs.

    schedule    GPipe, 1F1B, interleaved, ZB-H1, ZB-H2, ZB-V and forward-only, as frozen values
    graph       what a schedule's tasks wait for; refuses a schedule that cannot run
    simulate    start and end of every task, the step's time, the bubble, the activations held
    price       the same figures by closed form, for a search that asks thousands of times
    automatic   a schedule made for measured times and a memory limit
    partition   layers to stages
    picture     a timeline as SVG and as text

Nothing here imports JAX.
"""
