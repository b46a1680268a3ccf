# An agent: one a host. docs/compose.md says how to start it.
#   docker build -t vxmesh .
# BASE is any image with Python 3.11 or later and pip; of what else is needed only that is
# installed which it lacks, so where it has everything no network is needed.
ARG BASE=python:3.13-slim
FROM ${BASE}

# nft and ip change the kernel; iptables lets ours through where an engine blocks what it forwards.
RUN for each in nft:nftables ip:iproute2 iptables:iptables ping:iputils-ping; do \
      command -v "${each%:*}" >/dev/null || lacking="$lacking ${each#*:}"; \
    done; \
    if [ -n "$lacking" ]; then \
      apt-get update && apt-get install -y --no-install-recommends $lacking && \
      rm -rf /var/lib/apt/lists/*; \
    fi

# What changes seldom comes first: a new agent is a layer of a few megabytes.
COPY pyproject.toml constraints.txt /opt/vxmesh/
RUN cd /opt/vxmesh && python3 -c "import tomllib; \
      print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      >requirements.txt && \
    python3 -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
      -c constraints.txt -r requirements.txt && \
    for each in vxmesh:cli vxmesh-cni:cni; do \
      printf '#!%s\nimport sys\n\nsys.path.insert(0, "/opt/vxmesh")\nfrom agent.%s.main import main\n\nmain()\n' \
        "$(command -v python3)" "${each#*:}" >"/usr/local/bin/${each%:*}" && \
      chmod 755 "/usr/local/bin/${each%:*}" || exit 1; \
    done
COPY agent /opt/vxmesh/agent
RUN python3 -m compileall -q /opt/vxmesh/agent

# It has to be root, to change the host's network. No port is told of: the host's are used.
ENTRYPOINT ["vxmesh"]
CMD ["agent"]
HEALTHCHECK --interval=10s --timeout=10s --start-period=20s CMD ["vxmesh", "node", "ls"]
