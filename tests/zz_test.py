import time
import cProfile, pstats
def test_a(tiny, tmp_path):
  t=time.process_time()
  p=cProfile.Profile(time.process_time)
  p.enable()
  tiny.train(tmp_path/"a", tiny.config(), measure=True)
  p.disable()
  print("U", time.process_time()-t)
  pstats.Stats(p).sort_stats("cumtime").print_stats(60)
  t=time.process_time()
  tiny.train(tmp_path/"b", tiny.config(), measure=False)
  print("second", time.process_time()-t)
