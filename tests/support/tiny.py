"""A preset so small that the whole system runs through in a minute."""

TINY_RUN = """
name: tiny
runs: {folder}/runs
arms: [clip, roclip]
data: {{scenes: 400, min_shards: 1}}
attacks: {{targeted: {{images: 4, captions_per_image: 3}}, backdoors: [{{kind: patch, count: 10}}]}}
ingest: {{samples_per_shard: 128, image_size: 64, encode_format: png, encode_quality: 6,
  retry_passes: 0, policy: {{allow_networks: [127.0.0.0/8], robots: false, host_connections: 256, host_requests_per_s: 1.0e6}}}}
model: {{name: tiny}}
pool: {{size: 64, filter_frac: [0.1, 0.1]}}
train: {{epochs: 3, global_batch_size: 64, lr: 1e-3, log_every_steps: 1, checkpoint_every_steps: 4}}
evaluate: {{size: 60, every: 1}}
oracle: {{trusted: 200, epochs: 1}}
cluster: {{workers: 2}}
"""
