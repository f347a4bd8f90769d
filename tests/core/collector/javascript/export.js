// Exports three spans: node export.js json|proto|grpc URL gzip|none. Prints their trace id and the exporter's result.
import { CompressionAlgorithm } from "@opentelemetry/otlp-exporter-base";
import { OTLPTraceExporter as Grpc } from "@opentelemetry/exporter-trace-otlp-grpc";
import { OTLPTraceExporter as Json } from "@opentelemetry/exporter-trace-otlp-http";
import { OTLPTraceExporter as Proto } from "@opentelemetry/exporter-trace-otlp-proto";
import { BasicTracerProvider } from "@opentelemetry/sdk-trace-base";
import { ROOT_CONTEXT, trace } from "@opentelemetry/api";

const [kind, url, compression] = process.argv.slice(2);
const exporter = new { json: Json, proto: Proto, grpc: Grpc }[kind]({
  url,
  compression: compression === "gzip" ? CompressionAlgorithm.GZIP : CompressionAlgorithm.NONE,
});

const tracer = new BasicTracerProvider().getTracer("scope");
const root = tracer.startSpan("agent", { attributes: { "agl.role": "planner", ids: [1, 2, 3], score: 0.5, ok: true } });
const within = trace.setSpan(ROOT_CONTEXT, root);
const calls = ["a", "b"].map((name) => tracer.startSpan(`chat ${name}`, { attributes: { text: "näh " + name } }, within));
const spans = [...calls, root];
spans.forEach((span) => span.end());

exporter.export(spans, async ({ code, error }) => {
  await exporter.shutdown();
  console.log(JSON.stringify({ trace: root.spanContext().traceId, ok: code === 0, error: error?.message ?? null }));
});
