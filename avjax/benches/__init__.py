"""What `python -m avjax.bench` measures, one module per benchmark."""
