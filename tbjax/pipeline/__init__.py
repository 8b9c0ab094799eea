"""Pipelines: a schedule is data, which one simulator prices, one picture shows and one executor runs.

    schedule    GPipe, 1F1B, interleaved, ZB-H1, ZB-H2, ZB-V and forward-only, as frozen values
    graph       what a schedule's tasks wait for; refuses a schedule that cannot run
    simulate    start and end of every task, the step's time, the bubble, the activations held
    price       the same figures by closed form, for a search that asks thousands of times
    automatic   a schedule made for measured times and a memory limit
    partition   layers to stages
    picture     a timeline as SVG and as text

None of these imports JAX. What runs a schedule does:

    grid        a schedule as a table: what each stage does in each tick, and in which buffers
    phases      a layer's computation taken apart: forward, input gradient, weight gradients
    stages      a decoder cut into pieces
    training    what a stage does in training
    exchange    layers from where they are stored to the stages that run them, where those differ (see `tbjax.cut`)
    execute     the program: one scan over ticks for all stages
    inference   the programs that read prompts and write tokens
"""
