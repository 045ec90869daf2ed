"""What a real service does to its clients, simulated: `docs/policy.md` says what a policy file may hold.

spec        the validated file
answers     what is told of the logits: noise, temperature, probabilities, top-k, rounding
noise       the noise itself, fresh or a function of the image
limits      token buckets, one for each client and quota
fields      what the RateLimit header fields say of them
latency     how long an answer takes
failures    which requests fail for no reason of theirs
downtime    when nothing is answered
randomness  the seed that all of it comes from
policy      the parts wired, and the refusals they lead to
"""
