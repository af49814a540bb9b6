"""Galaxy Pulsar as a site: one PulsarSite over a carrier (REST here), and the embedded Pulsar of our own."""
