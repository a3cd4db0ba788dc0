"""Serve: many adapters over one base, behind one address that OpenAI's clients know.

Engines make tokens; names, keys, templates, checks and limits are the front's.

- `engine`: what an engine is to the front, whatever it is.
- `server_process`, `wire`: an engine's server as a process of its own, started again if it dies.
- `llamacpp`, `child`; `vllm`, `tether`: the two that are run so.
- `cohort`: this project's own, with all adapters in one batch.
- `adapters`, `prompts`, `stopping`: what is served under which name, how it is asked, what ends it.
- `options`, `engines`, `sizing`: the settings; which engine answers, and why; what it will hold.
- `requests`, `answers`, `front`, `metrics`, `running`: OpenAI's bodies, the routes, the process.
- `load`, `checks`: the load generator of `lighten bench serve`, and what it verifies.
"""
