"""Networks: backbones, heads, teachers, queues, and weights that others published."""
