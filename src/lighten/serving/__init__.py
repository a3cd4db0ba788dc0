"""Serve: many adapters over one base, behind one address that OpenAI's clients know.

Engines make tokens; names, keys, templates, checks and limits are the front's.

- `engine`: what an engine is to the front, whatever it is.
- `server_process`, `wire`: an engine's server as a process of its own, started again if it dies.
- `llamacpp`, `child`; `vllm`, `tether`: the two that are run so.
- `cohort`: this project's own, with all adapters in one batch.
- `schemas`, `grammar`, `texts`: answers that follow a JSON schema; tokens as text.
- `adapters`, `registry`: what is served under which name, and how that changes at run time.
- `prompts`, `stopping`: how it is asked, and what ends its answers.
- `options`, `engines`, `sizing`: the settings; which engine answers, and why; what it will hold.
- `requests`, `oversize`, `answers`: OpenAI's bodies, and what is refused of them.
- `front`, `answering`, `metrics`, `page`: the routes, and the answers of one request.
- `running`, `address`: the process, and where it listens.
- `remote`, `talk`: a client, and a conversation with a server.
- `load`, `checks`, `benching`: what `lighten bench serve` sends, verifies and writes.
"""
