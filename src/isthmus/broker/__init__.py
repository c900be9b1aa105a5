"""The broker: identities, rules, descriptors, accounting for one node.

It introduces programs to each other and then gets out of the way: no byte of a connection passes through it,
and connections outlive it. Read in this order: `policy` (who may talk to whom), `core` (what each message
does), `attachment` (one program's socket), `service` (the process around it).
"""
