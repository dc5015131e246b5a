import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.util.Properties;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.Stores;

/** The stream workload on Kafka Streams: exactly once, RocksDB, changelog, one thread. */
public class App {
    static final ObjectMapper JSON = new ObjectMapper();
    static final String NOTE = "x".repeat(100);

    /** Counts each key and keeps its payload. */
    static class Count implements Processor<String, byte[], String, byte[]> {
        private ProcessorContext<String, byte[]> context;
        private KeyValueStore<String, byte[]> store;

        @Override
        public void init(ProcessorContext<String, byte[]> given) {
            context = given;
            store = given.getStateStore("counts");
        }

        @Override
        public void process(Record<String, byte[]> record) {
            try {
                byte[] before = store.get(record.key());
                long count = 1 + (before == null ? 0 : JSON.readTree(before).get("count").asLong());
                ObjectNode state = JSON.createObjectNode().put("count", count);
                state.set("last", JSON.readTree(record.value()));
                store.put(record.key(), JSON.writeValueAsBytes(state.put("note", NOTE)));
                ObjectNode output = JSON.createObjectNode().put("key", record.key()).put("count", count);
                context.forward(record.withValue(JSON.writeValueAsBytes(output)));
            } catch (java.io.IOException error) {
                throw new IllegalStateException(error);
            }
        }
    }

    public static void main(String[] arguments) {
        Properties settings = new Properties();
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, "bench");
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, System.getenv("PEER_BOOTSTRAP"));
        settings.put(StreamsConfig.STATE_DIR_CONFIG, System.getenv("PEER_STATE"));
        settings.put(StreamsConfig.PROCESSING_GUARANTEE_CONFIG, StreamsConfig.EXACTLY_ONCE_V2);
        settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, 1);
        settings.put(StreamsConfig.REPLICATION_FACTOR_CONFIG, 1);
        settings.put("auto.offset.reset", "earliest");
        Topology topology = new Topology();
        topology.addSource("in", Serdes.String().deserializer(), Serdes.ByteArray().deserializer(), "input");
        topology.addProcessor("count", Count::new, "in");
        topology.addStateStore(Stores.keyValueStoreBuilder(
            Stores.persistentKeyValueStore("counts"), Serdes.String(), Serdes.ByteArray()), "count");
        topology.addSink("out", "output", Serdes.String().serializer(), Serdes.ByteArray().serializer(), "count");
        KafkaStreams streams = new KafkaStreams(topology, settings);
        Runtime.getRuntime().addShutdownHook(new Thread(streams::close));
        streams.start();
    }
}
