import pytest, time
from tests.conformance.test_log import on_kafka, wait_until, every, COMMANDS, EVENTS
import confluent_kafka as ck
@pytest.mark.kafka
@pytest.mark.parametrize("n", range(6))
def test_dbg(n, kafka_bootstrap, topic_prefix):
    b = on_kafka(kafka_bootstrap, topic_prefix)
    writer, watched = b.transactional(), b.watched("g")
    wait_until(lambda: watched.mine == every(COMMANDS), watched)
    wanted = [(COMMANDS, 0), (COMMANDS, 1)]
    def look(tag):
        t=time.time()
        f = watched.member._consumer.committed([ck.TopicPartition(topic_prefix+"task-commands", 0),ck.TopicPartition(topic_prefix+"task-commands", 1)], timeout=10)
        print(tag, [(x.offset, x.error) for x in f], f"{(time.time()-t)*1000:.1f}ms")
    look("start")
    writer.begin()
    writer.append(EVENTS, 0, None, b"a")
    look("open")
    writer.abort()
    look("aborted")
    writer.begin()
    writer.append(EVENTS, 0, None, b"a")
    t=time.time()
    writer.commit(watched.member, {(COMMANDS, 0): 7})
    print("commit", time.time()-t)
    for i in range(8): look("committed")
    b.close()
