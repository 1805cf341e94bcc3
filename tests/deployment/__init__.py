"""What is shipped for running the server elsewhere: the image, compose, Prometheus, Grafana, Kubernetes."""
