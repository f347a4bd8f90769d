{{- define "agl.labels" -}}
app.kubernetes.io/name: agl
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "agl.metadata" -}}
name: {{ .root.Release.Name }}-{{ .part }}
labels:
  {{- include "agl.labels" . | nindent 2 }}
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
  helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- define "agl.secret" -}}
{{ .Values.secret.existing | default (printf "%s-secrets" .Release.Name) }}
{{- end }}

{{- define "agl.image" -}}
{{- $image := index .root.Values.images .image -}}
image: {{ printf "%s:%s" $image.repository ($image.tag | default .root.Chart.AppVersion) | quote }}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
{{- end }}

{{- /* A variable of the Secret, under its own name. */ -}}
{{- define "agl.variable" -}}
- name: {{ .name }}
  valueFrom: {secretKeyRef: {name: {{ include "agl.secret" .root }}, key: {{ .name }}}}
{{- end }}

{{- /* The part of a Pod that is the same in all of them. */ -}}
{{- define "agl.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .user | default 10001 }}
  fsGroup: {{ .user | default 10001 }}
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "agl.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- /* `/api/health` needs no token. Within 2 s it answers also if store or engine do not: those are no reason to restart. */ -}}
{{- define "agl.probes" -}}
startupProbe:
  httpGet: {path: /api/health, port: api}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ .starting }}
readinessProbe:
  httpGet: {path: /api/health, port: api}
  periodSeconds: 10
  timeoutSeconds: 5
livenessProbe:
  httpGet: {path: /api/health, port: api}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
{{- end }}

{{- /* The names under which a Service is addressed, and those of the configuration: server.allowed_hosts. */ -}}
{{- define "agl.hosts" -}}
{{- $name := printf "%s-%s" .root.Release.Name .part }}
{{- $inside := printf "%s.%s" $name .root.Release.Namespace }}
{{- $hosts := list $name $inside (printf "%s.svc" $inside) (printf "%s.svc.cluster.local" $inside) }}
{{- toJson (dict "allowed_hosts" (concat $hosts (dig "server" "allowed_hosts" list .config))) }}
{{- end }}

{{- /* A ConfigMap is no place for a secret. */ -}}
{{- define "agl.checkSecrets" -}}
{{- if regexMatch `://[^/\s"'$]*:[^/\s"'$]+@` (toYaml (omit .config "store_uri")) }}
{{- fail (printf "%s holds a URL with a password: write ${NAME} in its place, and give env a variable NAME from a Secret" .key) }}
{{- end }}
{{- end }}

{{- /* The configuration of collectors (with the queue) or gateways. */ -}}
{{- define "agl.serveConfig" -}}
{{- $config := omit (deepCopy .root.Values.config) "queue_uri" }}
{{- include "agl.checkSecrets" (dict "key" "config" "config" $config) }}
{{- $_ := set $config "store_uri" "${AGL_STORE_URI}" }}
{{- $_ := set $config "server" (include "agl.hosts" (merge (dict "config" $config) .) | fromJson) }}
{{- if eq .part "collector" }}
{{- $_ := set $config "queue_uri" "${AGL_QUEUE_URI}" }}
{{- $config = omit $config "gateway" }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{- /* The configuration of a training and its runners; for these, the store's URI is the training's address. */ -}}
{{- define "agl.trainConfig" -}}
{{- $config := deepCopy .Values.trainer.config }}
{{- include "agl.checkSecrets" (dict "key" "trainer.config" "config" $config) }}
{{- $run := required "trainer.run is empty: name the run; a training that is not to resume needs another name" .Values.trainer.run }}
{{- $train := required "trainer.config.train is empty: it names model, agent, tasks and reward" $config.train }}
{{- $ours := dict "host" "0.0.0.0" "port" 8400 "otlp_http_port" 4318 "runners" "external" "output_dir" (printf "/var/lib/agl/runs/%s" $run) }}
{{- $_ := set $config "train" (merge $ours $train) }}
{{- $_ := set $config "store_uri" "${AGL_STORE_URI}" }}
{{- $_ := set $config "server" (include "agl.hosts" (dict "root" . "part" "trainer" "config" $config) | fromJson) }}
{{- toYaml $config }}
{{- end }}
