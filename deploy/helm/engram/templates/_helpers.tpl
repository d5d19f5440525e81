{{- define "engram.selector" -}}
app.kubernetes.io/name: engram
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "engram.labels" -}}
{{ include "engram.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "engram.settings" -}}
{{- $settings := .Values.settings }}
{{- if .Values.redis.private }}{{ $settings = merge (dict "data_dir" "/var/lib/engram") $settings }}{{ end }}
{{- if .Values.tokens.secret }}{{ $settings = merge (dict "tokens_file" "/etc/engram/tokens/tokens.toml") $settings }}{{ end }}
{{- if .Values.tls.secret }}{{ $settings = merge (dict "tls_cert" "/etc/engram/tls/tls.crt" "tls_key" "/etc/engram/tls/tls.key") $settings }}{{ end }}
{{- if .Values.models.image }}{{ $settings = merge (dict "models" "/models" "shipped_models" false) $settings }}{{ end }}
{{- range $name, $value := $settings }}
ENGRAM_{{ upper $name }}: {{ (kindIs "float64" $value | ternary (toJson $value) (toString $value)) | quote }}
{{- end }}
{{- end }}

{{- define "engram.container-security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- /* The kubelet's gRPC probes speak no TLS. The argument: the root, the path that stands for the same. */}}
{{- define "engram.probe" -}}
{{- if (index . 0).Values.tls.secret -}}
httpGet:
  path: {{ index . 1 }}
  port: metrics
{{- else -}}
grpc:
  port: 50051
{{- if eq (index . 1) "/healthz" }}
  service: liveness
{{- end }}
{{- end }}
{{- end }}
