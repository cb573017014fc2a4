"""A content-addressed store for the outputs of stages: blobs, trees, action records, leases and mid-stage checkpoints.

Layout, the same on every backend (local folder, S3, memory):

    v1/cas/<aa>/<digest>            immutable blob, named by the BLAKE3 digest of its bytes
    v1/tree/<aa>/<digest>           canonical JSON list of (path, size, digest): one stage output
    v1/act/<stage>/<key>.json       action record, written last and create-only: the one commit point
    v1/lease/<key>.json             who is running the stage now; every change is a compare-and-swap
    v1/wip/<key>/...                mid-stage checkpoints: data, then manifest, then LATEST by compare-and-swap
    v1/run/<id>.json                what a finished run consisted of

Invariants: what has no record does not exist; only "not found" is a miss, every other failure is raised; bytes read are
always checked against the digest that names them; nothing is pickled. This package never imports torch or prefect, nor
anything from `tasks` or `flows`.
"""
