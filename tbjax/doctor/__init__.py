"""What a machine, or many, can do and what is wrong with it, before a run finds out: `tbjax doctor`.

    machine   versions, host, devices and their memory: what can be read
    links     collectives along each axis of a mesh, checked and timed: what has to be tried
    hints     what both say about failures that are common, and where to look when a run has failed

Every process of a job takes part, as in a run: a link that is slow or broken shows here in seconds.
"""
